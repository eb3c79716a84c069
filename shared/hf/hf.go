// Package hf reads model folders in the format of Hugging Face: config.json and generation_config.json as written by
// transformers 4 and 5, and weights in safetensors files, one or sharded. It turns them into the values of
// shared/model. It reads no tokenizer (shared/token), chat template (shared/chat) or image processor settings
// (shared/imageprep), computes nothing, and downloads nothing.
//
// # Weights
//
// Safetensors files are mapped read-only and shared: a matrix that lies in the file as the engine wants it, rows of
// outputs in bf16, is a view into the mapping and costs no memory of its own. What lies otherwise is copied once: the
// fused experts of transformers 4, which are transposed, and matrices in another dtype, if every value of theirs is a
// bf16 exactly. Load copies experts too, each into an object of its own, into memory that the caller chooses and that the
// processes of a node may share; Weights keeps the copies that there must be in private memory.
package hf

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"trireme.dev/shared/model"
)

// Folder is an open model folder. It owns the mapped files and all memory that its Weights use.
type Folder struct {
	Dir        string
	Config     model.Config // with Name, the folder's last path element, and Digest
	Generation Generation

	// Progress, if not nil, is called by Weights while it copies: bytes copied so far and in all. Calls do not overlap
	// and done rises to total. It is not called when nothing is copied.
	Progress func(done, total int64)

	version int                     // major version of transformers that wrote the folder, 0 if unknown
	files   []*Safetensors          // all weight files
	index   map[string]*Safetensors // tensor name to the file that has it

	mu      sync.Mutex
	closed  bool
	weights *model.Weights // of Weights
	copies  private        // of Weights
	views   [][]byte       // parts of the files that weights are views of
	plans   map[planOf]*builder
	viewed  Parts // those whose views are among them
}

// Open reads the settings of the model in dir, maps its weights and checks that every tensor is there with the right
// shape and dtype; tensor data is read only for the digest's samples. The files must not be truncated while the folder
// is open. Errors name the file; they wrap ErrUnsupported, ErrConfig, ErrDamaged, ErrDType, ErrMissing or an error of
// the operating system.
func Open(dir string) (*Folder, error) {
	path := filepath.Join(dir, "config.json")
	// The architecture first: other ones' files may give the same keys other types.
	var kind archFile
	if err := readJSON(path, &kind); err != nil {
		return nil, err
	}
	if _, err := kind.arch(path); err != nil {
		return nil, err
	}
	var file configFile
	if err := readJSON(path, &file); err != nil {
		return nil, err
	}
	cfg, err := file.toConfig(path)
	if err != nil {
		return nil, err
	}
	if cfg.Name, err = folderName(dir); err != nil {
		return nil, err
	}
	generation, err := readGeneration(dir, &file, cfg.Text.Vocab)
	if err != nil {
		return nil, err
	}
	files, index, err := openShards(dir)
	if err != nil {
		return nil, err
	}
	f := &Folder{
		Dir: dir, Config: cfg, Generation: generation,
		version: major(file.TransformersVersion), files: files, index: index, plans: map[planOf]*builder{},
	}
	if _, err := newPlan(f, All, false); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	f.Config.Digest = digest(cfg, files, index)
	return f, nil
}

// ReadConfig returns what Open finds in dir, without keeping the folder open. It makes the same checks.
func ReadConfig(dir string) (model.Config, Generation, error) {
	f, err := Open(dir)
	if err != nil {
		return model.Config{}, Generation{}, err
	}
	return f.Config, f.Generation, f.Close()
}

// Weights returns all tensors of the model, in this process's memory. The first call copies what has to be copied, on all
// processors; later ones return the same value. The weights are read-only and valid until Close. It returns an ErrDType
// for a matrix with a value that bf16 does not have, and an error when there is no memory for the copies.
func (f *Folder) Weights() (*model.Weights, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.weights != nil {
		return f.weights, nil
	}
	var copies private
	w, err := f.load(context.Background(), &copies, All, false, nil, f.Progress)
	if err != nil {
		return nil, errors.Join(err, copies.close())
	}
	f.weights, f.copies = w, copies
	return w, nil
}

// Close unmaps the files and frees the copies. Weights and tensors of the folder must not be used any more. Closing
// twice is harmless.
func (f *Folder) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	errs := []error{f.copies.close()}
	f.weights, f.views = nil, nil
	for _, s := range f.files {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// folderName returns the last element of dir's absolute path.
func folderName(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("%s: %w", dir, err)
	}
	return filepath.Base(abs), nil
}
