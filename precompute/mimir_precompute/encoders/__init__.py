"""The frozen models, one module each; nothing heavy is imported here: `build.build_encoder` does it when asked."""
