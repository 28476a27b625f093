"""Speech: models that read sound and write down what was said."""
