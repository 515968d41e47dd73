"""`d3po-bench evaluate`: a run, a LoRA, a model or a folder of pictures, scored image by image."""
