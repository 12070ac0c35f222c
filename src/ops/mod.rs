//! candle custom operators with fast kernels.
