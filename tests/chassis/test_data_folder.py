"""The data folder: two shops cannot use it at once, and files removed from it are missed."""
import errno
import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from microshop.chassis import data_folder
from microshop.chassis.data_folder import FolderUnusable, OpenFiles, claim, last_changed
from tests.helpers import wait_until


class OpenFilesTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.file = self.folder / "a.db"
        self.file.touch()

    def replace_file(self):
        other = self.folder / "b.db"
        other.touch()
        other.rename(self.file)

    def settle(self):
        """Wait until a further change of the folder gets a later time than the last one."""
        wait_until(lambda: last_changed(str(self.folder)), "the folder's last change to be past")

    def test_a_file_that_is_removed_or_replaced_later_is_named(self):
        self.enterContext(mock.patch.object(data_folder, "RESOLUTION", 0.1))
        for change in (self.file.unlink, self.file.touch, self.replace_file):
            files = OpenFiles(self.folder, ["a.db"])
            self.settle()
            self.assertEqual((files.find_replaced(), files.find_replaced()), ("", ""))
            change()
            self.settle()
            self.assertEqual(files.find_replaced(), "a.db", change.__name__)

    def test_a_copy_that_is_put_in_place_with_the_old_times_is_noticed(self):
        self.enterContext(mock.patch.object(data_folder, "RESOLUTION", 0.1))
        files, times = OpenFiles(self.folder, ["a.db"]), self.folder.stat()
        self.settle()
        self.assertEqual(files.find_replaced(), "")
        self.replace_file()
        os.utime(self.folder, ns=(times.st_atime_ns, times.st_mtime_ns))
        self.settle()
        self.assertEqual(files.find_replaced(), "a.db")

    def test_a_folder_that_was_changed_just_now_is_looked_through_each_time(self):
        self.assertIsNone(last_changed(str(self.folder)))

    def test_a_file_is_named_when_its_folder_is_moved_away_and_another_made(self):
        data = self.folder / "data"
        self.make(data)
        files = OpenFiles(data, ["a.db"])
        self.assertEqual(files.find_replaced(), "")
        data.rename(self.folder / "away")
        self.make(data)
        self.assertEqual(files.find_replaced(), "a.db")

    def make(self, folder):
        folder.mkdir()
        (folder / "a.db").touch()


class ClaimTest(unittest.TestCase):
    def setUp(self):
        temporary = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.folder = temporary / "deep" / "data"

    def claim(self, shared):
        descriptor = claim(self.folder, shared)
        self.addCleanup(os.close, descriptor)

    def refuse(self, shared):
        """Check that the folder cannot be claimed; return the message, one line that names it."""
        with self.assertRaises(FolderUnusable, msg="the claim was granted") as caught:
            os.close(claim(self.folder, shared))
        message = str(caught.exception)
        self.assertNotIn("\n", message)
        self.assertIn(f"the folder {self.folder}", message)
        self.assertTrue(message.endswith("choose another --data"), message)
        return message

    def test_a_second_shop_and_a_service_alone_are_refused_where_a_shop_is(self):
        self.claim(shared=False)
        for shared in (False, True):
            self.assertIn("another shop, or a service that runs alone", self.refuse(shared))

    def test_services_that_run_alone_share_a_folder_and_a_shop_is_refused_there(self):
        self.claim(shared=True)
        self.claim(shared=True)
        self.refuse(shared=False)

    def test_a_claim_ends_when_its_descriptor_is_closed(self):
        os.close(claim(self.folder, shared=False))
        self.claim(shared=False)

    def test_a_claim_leaves_no_file(self):
        self.claim(shared=False)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_file_in_place_of_the_folder_is_refused(self):
        self.folder.parent.write_text("")
        self.assertIn("Not a directory", self.refuse(shared=False))

    def test_a_file_system_without_locks_keeps_no_shop_from_starting(self):
        error = OSError(errno.ENOLCK, "No locks available")
        with mock.patch.object(data_folder.fcntl, "flock", side_effect=error):
            self.claim(shared=False)
            self.claim(shared=False)


if __name__ == "__main__":
    unittest.main()
