"""What a trained model is good for: one task a module (see `tasks`), run by ``sovit eval``."""
