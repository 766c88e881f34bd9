"""From images to instances, and to pictures of them."""
