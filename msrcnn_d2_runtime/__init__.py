"""
Use predictions and exported models without PyTorch and Detectron2.

Nothing here imports them, or msrcnn_d2, so that it runs where they cannot be installed. This
package needs NumPy and Pillow; modules that need more import it when they are imported::

    image_reading, mask_encoding   from files to pixels, from pixels to masks in COCO's format
    predictions                    Predictions of an image and their Masks, in NumPy
    ranking                        which predictions are returned, in which order
    tiling                         predictions on tiles of large images
    predictor                      what a predictor is, with PyTorch or without
    onnx_predictor, exported       predict with a model that was exported
    inputs, filtering, pipeline    from files and folders to predictions of many images
    drawing, labels, class_colors  pictures of predictions
    outputs                        files and streams with predictions, in many formats
    scores, iou_thresholds         the names of the scores, COCO's IoUs
    errors, files, text, fonts     what all packages share
"""
