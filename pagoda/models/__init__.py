"""Floor 2: what the families share (spec, decoder) and what each of them says about itself."""
