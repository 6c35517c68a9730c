"""What stands in front of transformers' OpenAI-compatible server; needs the packages of the extra ``serve``."""
