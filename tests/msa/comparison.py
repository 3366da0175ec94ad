"""How far results may lie from what they are compared with."""

SELECTION_RTOL = 2.0**-20  # of the largest sum of |q_i k_i| over the visible keys


def relative_error(actual, expected, floor=1e-30):
    """Norm of the difference over the norm of `expected` (at least `floor`), in float64; NaN stays and fails `<`."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    return ((actual - expected).norm() / expected.norm().clamp_min(floor)).item()


def assert_rows(out, expected, tolerance):
    """Within the tolerance in all, and no row of a head lost among the others."""
    assert relative_error(out, expected) < tolerance
    worst = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-3)
    assert worst.numel() == 0 or worst.max().item() < 10 * tolerance
