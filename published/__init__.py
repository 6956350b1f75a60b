"""What lies on a disk or on the Hub: model folders, data files. The ground floor: it imports no other file of ours."""
