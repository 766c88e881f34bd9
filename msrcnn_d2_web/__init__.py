"""
A page in the browser to try a model on: `msrcnn-d2 demo`.

It takes any :class:`~msrcnn_d2_runtime.predictor.Predictor` and needs no PyTorch itself::

    analysis    an uploaded image and its predictions; which of them are shown, in which order
    store       the analyses of all users, each under a secret key
    pictures    the picture and the JSON of what is shown
    page        the page, in Gradio
    guard       which requests the server answers
    server      the server: the page, uploads and downloads
"""
