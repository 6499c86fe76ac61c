"""A trained model as files for others: safetensors with a shape card, timm, Hugging Face, ONNX."""
