"""Names, signatures and defaults of other code bases: NeMo Automodel's."""
