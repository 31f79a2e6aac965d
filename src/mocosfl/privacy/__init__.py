"""What latents tell of the images: defences that let them tell less, attacks, and their scores."""
