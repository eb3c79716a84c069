package hf

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// ErrMissing is returned by Open when a weight file or a tensor that the folder should have is not there.
var ErrMissing = errors.New("missing")

// The names that transformers gives to weights (SAFE_WEIGHTS_NAME and SAFE_WEIGHTS_INDEX_NAME).
const (
	singleFile = "model.safetensors"
	indexFile  = "model.safetensors.index.json"
)

// openShards opens the weight files of dir, one or several, and says which file has each tensor. As in transformers,
// a single file counts before an index.
func openShards(dir string) (files []*Safetensors, index map[string]*Safetensors, err error) {
	if _, err := os.Stat(filepath.Join(dir, singleFile)); err == nil {
		return openSingle(filepath.Join(dir, singleFile))
	}
	path := filepath.Join(dir, indexFile)
	var file struct {
		WeightMap map[string]string `json:"weight_map"`
	}
	if err := readJSON(path, &file); errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%s: weights: neither %s nor %s: %w", dir, singleFile, indexFile, ErrMissing)
	} else if err != nil {
		return nil, nil, err
	}
	if len(file.WeightMap) == 0 {
		return nil, nil, fmt.Errorf("%s: weight_map: %w", path, ErrMissing)
	}

	defer func() {
		if err != nil {
			for _, f := range files {
				err = errors.Join(err, f.Close())
			}
			files = nil
		}
	}()
	byName := map[string]*Safetensors{}
	for _, name := range slices.Sorted(maps.Values(file.WeightMap)) {
		if byName[name] != nil {
			continue
		}
		if !filepath.IsLocal(name) || filepath.Base(name) != name {
			return files, nil, fmt.Errorf("%s: %q is not the name of a file in the folder: %w", path, name, ErrConfig)
		}
		f, err := OpenSafetensors(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			return files, nil, fmt.Errorf("%s: weight file named in %s: %w", filepath.Join(dir, name), indexFile, ErrMissing)
		}
		if err != nil {
			return files, nil, err
		}
		byName[name] = f
		files = append(files, f)
	}
	index = make(map[string]*Safetensors, len(file.WeightMap))
	for _, tensor := range slices.Sorted(maps.Keys(file.WeightMap)) {
		f := byName[file.WeightMap[tensor]]
		if _, ok := f.Tensor(tensor); !ok {
			return files, nil, fmt.Errorf("%s: tensor %s, which %s says is there: %w", f.Path(), tensor, indexFile, ErrMissing)
		}
		index[tensor] = f
	}
	return files, index, nil
}

// openSingle opens the one weight file at path.
func openSingle(path string) ([]*Safetensors, map[string]*Safetensors, error) {
	f, err := OpenSafetensors(path)
	if err != nil {
		return nil, nil, err
	}
	index := make(map[string]*Safetensors, len(f.names))
	for _, name := range f.names {
		index[name] = f
	}
	return []*Safetensors{f}, index, nil
}
