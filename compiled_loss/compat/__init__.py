"""Other code bases' names, signatures and defaults, kept: NeMo Automodel's."""
