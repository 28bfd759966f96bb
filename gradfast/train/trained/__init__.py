"""What is done with a trained model: ``gradfast eval``, ``predict`` and ``export``."""
