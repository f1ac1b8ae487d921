"""The frozen models, one module each; nothing heavy is imported here: `build.build_encoder` does it when asked."""

from mimir_shared.command_line import quiet_libraries

quiet_libraries()  # before any of them is imported, whichever program does it
