"""Between checkpoint files and modules: fused projections, parts that are loaded alone, quantized weights."""
