"""What lies on a disk or on the Hub: model folders, data files. The ground floor: nothing here imports another file of ours."""
