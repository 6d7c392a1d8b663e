"""Networks for several tasks: plain ``nn.Module`` classes that map inputs to a dict of predictions.

``MultiHeadNetwork`` joins an encoder, which maps inputs to features, and one head per task. Features have the shape
``(B, out_features)``, and heads are linear; or, for a prediction at every pixel, they are a map, shape
``(B, out_features, height / stride, width / stride)``, from ``EncoderDecoder`` or ``TimmViTEncoder``, and heads are
``DenseHead(encoder.out_features, out_channels, scale_factor=encoder.stride)``.
"""

from mtl_lightning.networks.conv import ConvEncoder
from mtl_lightning.networks.dense_head import DenseHead
from mtl_lightning.networks.encoder_decoder import EncoderDecoder
from mtl_lightning.networks.lenet import LeNetEncoder
from mtl_lightning.networks.mlp import MLP
from mtl_lightning.networks.multi_head import MultiHeadNetwork
from mtl_lightning.networks.pareto_hypernetwork import ParetoHypernetwork
from mtl_lightning.networks.pareto_manifold import ParetoManifold
from mtl_lightning.networks.preference_concatenation import PreferenceConcatenation, PreferenceUpsampling
from mtl_lightning.networks.timm_vit import TimmViTEncoder
from mtl_lightning.networks.vit import VisionTransformerEncoder

__all__ = [
    "MLP",
    "ConvEncoder",
    "DenseHead",
    "EncoderDecoder",
    "LeNetEncoder",
    "MultiHeadNetwork",
    "ParetoHypernetwork",
    "ParetoManifold",
    "PreferenceConcatenation",
    "PreferenceUpsampling",
    "TimmViTEncoder",
    "VisionTransformerEncoder",
]
