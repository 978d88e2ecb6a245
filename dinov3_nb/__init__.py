"Turn DINOv3 into your own image classifier. The other modules of this package are exported from nbs/."
import logging
import sys

__version__ = "0.1.0"

# bitsandbytes warns of a missing kernel that we don't use, and it speaks as soon as peft is there to import it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Importing the package registers its classifiers with transformers' Auto classes, which takes PyTorch and
# seconds. The command line (_dinov3_nb_command.py) does without: each command imports what it needs itself.
if "_dinov3_nb_command" not in sys.modules:
    from dinov3_nb.backbone import load_backbone, pool_tokens
    from dinov3_nb.core import (
        DataArguments, FeatureArguments, ModelArguments, QuantizationArguments, Settings,
        TrainArguments, TuneArguments, UserError,
    )
    from dinov3_nb.evaluation import evaluate
    from dinov3_nb.export import export
    from dinov3_nb.inference import Classifier, load_classifier
    from dinov3_nb.model import DinoV3Config, DinoV3Linear, DinoV3MLP
    from dinov3_nb.onnx_inference import load_onnx
    from dinov3_nb.report import report
    from dinov3_nb.run import probe, train
