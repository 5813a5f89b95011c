"""What the fork server of a launcher loads for instances of a real model.

What is imported stays: looking for garbage in it takes two fifths of the time of the imports, and in an instance,
which shares it with the others, would copy the pages that are looked at.
"""

import gc
from importlib import import_module

from flowkv.engine.run_folder import remove_late_comers

gc.disable()
import_module("flowkv.engine.torch_model")
gc.freeze()
gc.enable()
remove_late_comers()
