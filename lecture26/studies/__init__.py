"""What is measured of the trained models, and takes too long for a notebook's cell."""
