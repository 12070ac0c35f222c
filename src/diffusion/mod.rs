//! Residual-shifting diffusion (ResShift, arXiv 2307.12348): noise schedule, forward process and samplers.
