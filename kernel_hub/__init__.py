"""Makes a kernel for Hugging Face's hub of this repository: python -m kernel_hub."""
