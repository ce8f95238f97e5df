folders = {"diffusers": []}
models_dir = "models"


def get_folder_paths(name):
    return folders[name]
