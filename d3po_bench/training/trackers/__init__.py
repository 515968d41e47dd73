"""Where metrics go beside the run folder, one file each."""
