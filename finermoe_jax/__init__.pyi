from .config.model import ModelConfig as ModelConfig
from .config.model import MoEConfig as MoEConfig
from .config.parse import default_config as default_config
from .config.parse import preset as preset
from .config.parse import run_config as run_config
from .config.run import RunConfig as RunConfig
from .config.upcycle import UpcycleConfig as UpcycleConfig
from .errors import InputError as InputError
from .generation.decode import generate as generate
from .generation.text import complete as complete
from .model.decoder import Decoder as Decoder
from .model.decoder import Output as Output
from .model.decoder import with_layer as with_layer
from .moe.layer import FineRMoE as FineRMoE
from .moe.routing import home as home
from .weights.checkpoint import load_checkpoint as load_checkpoint
from .weights.checkpoint import save_checkpoint as save_checkpoint
from .weights.hf_weights import load_hf as load_hf
from .weights.hf_weights import save_hf as save_hf
from .weights.source import load_tokenizer as load_tokenizer
from .weights.upcycle import upcycle as upcycle
from .weights.upcycle import upcycle_model as upcycle_model

__all__ = [
    "Decoder",
    "FineRMoE",
    "InputError",
    "MoEConfig",
    "ModelConfig",
    "Output",
    "RunConfig",
    "UpcycleConfig",
    "complete",
    "default_config",
    "generate",
    "home",
    "load_checkpoint",
    "load_hf",
    "load_tokenizer",
    "preset",
    "run_config",
    "save_checkpoint",
    "save_hf",
    "upcycle",
    "upcycle_model",
    "with_layer",
]

__version__: str
