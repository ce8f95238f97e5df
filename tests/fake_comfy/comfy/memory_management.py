released = []


def extra_ram_release(target, free_active=False):
    released.append(target)
    return 0
