"""From checkpoint files to modules and back: fused projections, parts that are loaded alone, quantized weights."""
