"""Floor 1: the parts a model is made of. Each takes a Mesh and holds its weights; none knows a request or a global."""
