"""Cuts frames into the flat patches that the vision tower reads."""

import torch


def patchify(frames: torch.Tensor, *, patch_size: int, temporal_patch_size: int, merge_size: int) -> torch.Tensor:
    """Cuts a batch of frame sequences of equal length and size into patches.

    Args:
        frames (batch, frames, channels, height, width): Height and width are multiples of patch_size * merge_size. The
            last frame is repeated until the number of frames is a multiple of `temporal_patch_size`.
        patch_size (int): Side of a patch, in pixels.
        temporal_patch_size (int): Frames in a patch.
        merge_size (int): merge_size x merge_size patches become one token.

    Returns:
        (batch, grid_t * grid_h * grid_w, channels * temporal_patch_size * patch_size * patch_size): The patches. The
        patches that the projector merges into one token lie next to each other.
    """
    if missing := -frames.shape[1] % temporal_patch_size:
        frames = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    batch, num_frames, channels, height, width = frames.shape
    grid_t, grid_h, grid_w = num_frames // temporal_patch_size, height // patch_size, width // patch_size
    patches = frames.reshape(
        batch,
        grid_t,
        temporal_patch_size,
        channels,
        grid_h // merge_size,
        merge_size,
        patch_size,
        grid_w // merge_size,
        merge_size,
        patch_size,
    )
    # to (batch, time, merged row, merged column, row in it, column in it, channel, time in patch, y, x)
    patches = patches.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return patches.reshape(batch, grid_t * grid_h * grid_w, channels * temporal_patch_size * patch_size**2)
