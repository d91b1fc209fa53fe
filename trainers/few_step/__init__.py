"""Few-step generators: distillation of the model before training, with and without a reward."""
