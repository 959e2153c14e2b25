"""vlaflow trains, calibrates, evaluates and serves vision-language-action policies.

The rooms, from the ground up: ``spec`` (the nouns), ``nn`` and ``flows`` (mathematics), ``data`` and ``simulators``,
``robot`` (a client without torch), ``backbones``, ``stacks``, ``decoders``, ``compute``, ``policies``, ``training``,
``evaluation``, ``serving``, ``cli``. Imports only point down that list. Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
