"""The areas of polygons, counted."""

import numpy as np
import pycocotools.mask as mask_util
import torch


def rasterised_area(polygons, image_size, subpixels=8):
    """The area of one object inside the image, in pixels, counted in parts of pixels."""
    size = [subpixels * side for side in image_size]
    rles = mask_util.frPyObjects([subpixels * np.asarray(p) for p in polygons], *size)
    return mask_util.area(mask_util.merge(rles)) / subpixels**2


def assert_areas_are_rasterised(masks, image_size, areas):
    """Up to the edges: a quarter of a part of a pixel along them, and 3 % of thin objects."""
    expected = [rasterised_area(p, image_size) if p else 0 for p in masks.polygons]
    torch.testing.assert_close(areas, torch.tensor(expected).double(), rtol=0.03, atol=1.0)
