"""Default sampling settings of `sample`, training samples and exported models. Imports nothing."""

TEMPERATURE = 0.8
TOP_K = 200
TOP_P = 1.0
