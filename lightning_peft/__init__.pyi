from .adapterhub.importing import import_adapterhub as import_adapterhub
from .backbone.targets import Layers as Layers
from .callbacks.edits.caa import edit_caa as edit_caa
from .callbacks.edits.iti import edit_iti as edit_iti
from .fitting.checkpoint_files import export_checkpoint as export_checkpoint
from .fitting.checkpoints import load_from_checkpoint as load_from_checkpoint
from .fitting.fabric import load_trained as load_trained
from .fitting.fabric import trained_only as trained_only
from .fitting.reading_edit import edit as edit
from .fitting.strength_within import strength_within as strength_within
from .positions import answering as answering
from .positions import plain_text as plain_text
from .stack.adapter_files.as_lora import as_lora as as_lora
from .stack.adapter_files.baking import bake as bake
from .stack.adapter_files.control_vectors import export_control_vector as export_control_vector
from .stack.adapter_files.folder import AdapterError as AdapterError
from .stack.adapter_files.saving import load_adapter as load_adapter
from .stack.adapter_files.saving import save_adapter as save_adapter
from .stack.computed import ComputedAdapter as ComputedAdapter
from .stack.stack import AdapterStack as AdapterStack
from .stack.stack import adapters as adapters
from .stack.steering import steering as steering

__version__: str
