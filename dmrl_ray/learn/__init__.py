"""Steps along gradients: optimisers, compiled gradients, minibatches, trust regions, PCA."""
