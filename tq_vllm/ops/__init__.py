"""Operations on a TurboQuant cache: schema, kernels, and which kernel serves a call."""
