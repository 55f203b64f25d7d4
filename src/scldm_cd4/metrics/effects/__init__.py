"""Effects of perturbations: mean shifts against the control, and whether they can be told apart."""
