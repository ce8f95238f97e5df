context = None


def get_executing_context():
    return context
