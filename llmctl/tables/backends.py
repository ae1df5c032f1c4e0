"""What can run a model."""

BACKENDS = ("auto", "native", "transformers")
"""native: the model core of llmctl; transformers: any language model of that library; auto: native where it can."""
