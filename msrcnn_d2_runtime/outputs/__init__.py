"""
Write predictions to files. Each format has its module::

    folder          OutputFolder: a folder with any of the formats, which survives a kill
    json_lines      JSON lines to a stream
    pictures        the images with predictions drawn on them
    videos          the same for videos
    coco_results    COCO results, for evaluations
    coco_dataset    COCO dataset, for annotation tools and training
    polygons        outlines of masks with their holes, for the dataset
    csv_table       CSV
    png_masks       label maps, and masks of single objects, as PNG
    records         the JSON of an image, from which all of them are made
    journal         the file with these, one line for each image that is done
    coco_ids        ids of images and classes
"""

from .folder import KINDS, OutputFolder
from .json_lines import JsonLines

__all__ = ["KINDS", "JsonLines", "OutputFolder"]
