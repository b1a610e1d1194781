"""What chapters' functions reach together, where no other command draws it: a file for each chapter."""
