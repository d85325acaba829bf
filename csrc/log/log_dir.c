#include "log/log_dir.h"

#include "base/util.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Make the entry of a new directory durable. */
static int sync_parent(char *path)
{
    char *slash = strrchr(path, '/');
    struct disk_file dir;

    if (slash && slash != path)
        *slash = 0;
    int err = disk_open(&dir, !slash ? "." : slash == path ? "/" : path, O_RDONLY | O_DIRECTORY);
    if (slash)
        *slash = '/';
    if (err)
        return err;
    err = disk_sync(&dir, DISK_DIR_BEGIN);
    disk_close(&dir);
    return err;
}

static int make_dirs(const char *path)
{
    char *copy = strdup(path);
    int err = copy ? 0 : -ENOMEM;

    for (char *at = copy; at && !err;) {
        at = strchr(at + 1, '/');
        if (at)
            *at = 0;
        if (mkdir(copy, 0700))
            err = errno == EEXIST ? 0 : -errno;
        else if ((err = sync_parent(copy)))
            rmdir(copy); /* one that is there counts as durable the next time */
        if (at)
            *at = '/';
    }
    free(copy);
    return err;
}

static int make_parents(char *path)
{
    char *slash = strrchr(path, '/');

    if (!slash || slash == path)
        return 0;
    *slash = 0;
    int err = make_dirs(path);
    *slash = '/';
    return err;
}

int log_dir_open(struct disk_file *dir, char *path, struct witness_file *witness)
{
    int err = make_parents(path);

    if (!err) { /* before the directory, whose first entry makes it durable too */
        bool made = witness_make(witness, path), there = !access(path, F_OK);
        err = made && there ? sync_parent(path) : make_dirs(path);
        if (err && made) { /* made again, and synced, the next time */
            disk_unlink(witness->file.path);
            witness_close(witness);
        }
    }
    if (!err)
        err = disk_open(dir, path, O_RDONLY | O_DIRECTORY);
    return err ? fail(err, "cannot create the log directory %s: %s", path, strerror(-err)) : 0;
}
