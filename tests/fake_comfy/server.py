class PromptServer:
    """Without an instance, as before ComfyUI's server runs."""
