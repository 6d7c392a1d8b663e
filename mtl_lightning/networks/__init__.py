"""Networks for several tasks: plain ``nn.Module`` classes that map inputs to a dict of predictions.

``MultiHeadNetwork`` joins an encoder, which maps inputs to features, shape ``(B, out_features)``, and one head per
task.
"""

from mtl_lightning.networks.conv import ConvEncoder
from mtl_lightning.networks.lenet import LeNetEncoder
from mtl_lightning.networks.mlp import MLP
from mtl_lightning.networks.multi_head import MultiHeadNetwork
from mtl_lightning.networks.vit import VisionTransformerEncoder

__all__ = ["MLP", "ConvEncoder", "LeNetEncoder", "MultiHeadNetwork", "VisionTransformerEncoder"]
