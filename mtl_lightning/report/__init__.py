"""What a run has left in its folder, on one page: read by ``reading``, written by ``page``."""

from mtl_lightning.report.page import page as page
from mtl_lightning.report.page import write_page as write_page
from mtl_lightning.report.reading import Run as Run
from mtl_lightning.report.reading import find_run as find_run
from mtl_lightning.report.reading import read_run as read_run
