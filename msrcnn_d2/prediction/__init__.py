"""From images to instances, and pictures of them."""
