from sotopia_folder import content, folder, real_folder, write_folder

__all__ = ["content", "folder", "real_folder", "write_folder"]
