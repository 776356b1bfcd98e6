(on request_headers
  (call $show @first@ (call $get_header_map_value #0 @x-dup@ OUT))
  (call $say @pairs@ (call $get_header_map_pairs #0 OUT))
  (call $list @x-dup@)
  (if (call $path @/replace@) (then (call $say @replace@ (call $replace_header_map_value #0 @x-dup@ @only@))))
  (if (call $path @/remove@) (then (call $say @remove@ (call $remove_header_map_value #0 @x-dup@))))
  (if (call $path @/add@) (then (call $say @add@ (call $add_header_map_value #0 @x-dup@ @3@))))
  (call $say @none@ (call $remove_header_map_value #0 @x-none@))
  #0)
